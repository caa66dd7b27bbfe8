"""Captions of eight images in six languages and more, three an image, written for the tests and docs/data.md."""

# A language's name, then an image a line.
TEXTS = """
English
A red bus drives along a wet street. | The red bus is on the street. | A bus in the rain.
Two dogs play with a ball on the beach. | Dogs are running after a ball. | Two brown dogs by the sea.
A man's T-shirt says 'stop' in white letters. | A man in a red shirt. | He wears a shirt with a word on it.
A cat sleeps on the sofa next to a lamp. | The cat is sleeping. | A gray cat on a blue sofa.
A plate with rice, fish and green beans. | Fish with rice on a plate. | Lunch is on the table.
Children fly a kite in the park at noon. | A kite over the park. | Three children look at a kite.
An old clock shows 10:30. | The clock on the tower. | It is half past ten on the tower's clock.
A woman reads a book under a tree. | A woman with a book. | She is reading in the shade of a tree.

French
Un bus rouge roule à côté d'une forêt mouillée. | Le bus est arrêté près d'un café. | Un bus l'été.
Deux chiens jouent sur la plage ensoleillée. | Des chiens courent après un ballon. | Deux chiens à la mer.
Un homme porte un vêtement à carreaux. | L'homme est très âgé. | Un homme élégant dans la rue.
Un chat dort sur le canapé à côté d'une lampe. | Le chat est fatigué. | Un chat gris sur un canapé bleu.
Une assiette de pâtes avec du fromage râpé. | Des pâtes et du blé. | Le déjeuner est prêt.
Des enfants font voler un cerf-volant. | Un cerf-volant s'élève. | Trois élèves regardent le ciel bleuté.
Une vieille horloge à l'entrée de l'église. | L'horloge de l'hôtel. | Il est dix heures passées.
Une femme lit à l'ombre d'un chêne. | La femme est assise par terre. | Elle étudie près de la fenêtre.

German
Ein roter Bus fährt über die nasse Straße. | Der Bus hält an der Brücke. | Ein Bus im Regen.
Zwei Hunde spielen am Strand mit einem Ball. | Die Hunde laufen ins Wasser. | Zwei große Hunde.
Ein Mann trägt ein grünes Hemd. | Der Mann lächelt fröhlich. | Er hat eine Mütze auf.
Eine Katze schläft auf dem Sofa. | Die Katze träumt. | Eine graue Katze liegt neben der Lampe.
Ein Teller mit Gemüse und Kartoffelklößen. | Das Essen ist heiß. | Auf dem Tisch stehen Brötchen.
Kinder lassen im Park Drachen steigen. | Ein Drachen über den Bäumen. | Drei Schüler blicken hoch.
Eine alte Uhr zeigt halb elf. | Die Uhr hängt am Rathausturm. | Es ist spät geworden.
Eine Frau liest ein Buch unter einem Baum. | Die Frau sitzt im Grünen. | Sie hört den Vögeln zu.

Spanish
Un autobús rojo pasa junto al café. | El autobús está en la estación. | Un autobús bajo la lluvia.
Dos perros juegan en la playa con un balón. | Los perros están corriendo allí. | Dos perros pequeños.
Un niño sonríe con su camión de juguete. | El niño tiene un avión. | Un niño pequeño en el jardín.
Un gato duerme en el sofá. | El gato está dormido en el rincón. | Un gato gris bajo la lámpara.
Un plato de arroz con jamón y piña. | La comida está lista. | Un almuerzo típico español.
Los niños vuelan una cometa en otoño. | Una cometa sobre los árboles. | Tres niñas miran al cielo.
Un reloj antiguo marca las diez. | El reloj está en la catedral. | Aún es de mañana en la plaza.
Una mujer lee bajo un árbol. | La mujer está leyendo un periódico. | Ella descansa en el césped.

Vietnamese
Một chiếc xe buýt màu đỏ chạy trên đường ướt. | Xe buýt dừng ở bến. | Xe buýt trong mưa.
Hai con chó chơi bóng trên bãi biển. | Những con chó đang chạy. | Hai con chó màu nâu.
Một người đàn ông mặc áo xanh. | Người đàn ông đang cười. | Ông ấy đội mũ trắng.
Con mèo ngủ trên ghế sô pha. | Con mèo đang ngủ. | Con mèo xám nằm cạnh cái đèn.
Một đĩa cơm với cá và rau. | Cá và cơm trên đĩa. | Bữa trưa đã sẵn sàng.
Trẻ em thả diều trong công viên. | Một con diều trên trời. | Ba đứa trẻ nhìn lên cao.
Chiếc đồng hồ cũ chỉ mười giờ. | Đồng hồ trên tháp. | Bây giờ là buổi sáng.
Một người phụ nữ đọc sách dưới gốc cây. | Người phụ nữ với quyển sách. | Cô ấy ngồi trong bóng mát.

Chinese
一辆红色的公共汽车在路上行驶。 | 公共汽车停在车站。 | 雨中的汽车。
两只狗在海边玩球。 | 狗在追一个球。 | 海边有两只棕色的狗。
一个男人穿着红色的T恤。 | 男人在笑。 | 他的衣服上有一个字。
一只猫在沙发上睡觉。 | 猫睡着了。 | 灰色的猫在蓝色的沙发上。
盘子里有米饭、鱼和青菜。 | 一盘鱼和米饭。 | 午饭在桌上。
3个孩子在公园里放风筝。 | 公园上面有一个风筝。 | 孩子们看着天上的风筝。
一个旧钟指着10:30。 | 塔上的大钟。 | 现在是十点半。
一个女人在树下看书。 | 女人手里有一本书。 | 她在树下坐着。

Japanese
赤いバスが道を走っています。 | バスが駅の前にいる。 | 雨の中のバス。
2匹の犬が海でボール遊びをしている。 | 犬がボールを追う。 | 海に犬が2匹いる。
男の人が赤いTシャツを着ている。 | 男が笑っている。 | シャツに文字がある。
猫がソファで寝ている。 | 猫は眠い。 | 青いソファに灰色の猫がいる。
皿にご飯と魚がある。 | 魚とご飯。 | 昼ご飯は机の上だ。
子供が公園で凧を上げている。 | 公園の上に凧がある。 | 3人の子供が空を見る。
古い時計は10時30分だ。 | 塔の上の時計。 | 今は朝です。
女の人が木の下で本を読む。 | 女が本を持つ。 | 木の下に座っている。

Hindi
एक लाल बस सड़क पर चल रही है। | बस बारिश में है। | लाल बस।
दो कुत्ते गेंद से खेल रहे हैं। | कुत्ते दौड़ रहे हैं। | दो भूरे कुत्ते।
बिल्ली सोफे पर सो रही है। | एक बिल्ली। | काली बिल्ली सोती है।

Korean
빨간 버스가 길을 달린다. | 버스가 역 앞에 있다. | 비 오는 날의 버스.
개 두 마리가 바다에서 공놀이를 한다. | 개가 공을 쫓는다. | 바다에 개가 있다.
"""
CAPTIONS = {
    language: [line.split(" | ") for line in lines]
    for language, *lines in (block.splitlines() for block in TEXTS.strip().split("\n\n"))
}
