"""Make everything under data/: a corpus of film reviews, a language model, two reward models.

The offline default of trpo_lm uses these files. Nothing is downloaded: the grammar below generates
the sentences, and the weights are trained on the sentences.

    python data/make.py                      # all stages, about 14 minutes on one core
    python data/make.py corpus               # data/corpus_*.jsonl and data/prompts_*.jsonl
    python data/make.py lm                   # data/lm
    python data/make.py reward_model         # data/reward_model and data/judge
    python data/make.py measure              # the figures of data/README.md

The grammar. A sentence starts as "[sentence]" and every [symbol] is replaced by one of its
alternatives until none is left. The label (0 negative, 1 positive) comes first and decides what a
symbol becomes:

    [x]    an alternative of the sentence's label (or any, if x has no polarity)
    [!x]   one of the opposite label: "although the plot [!vp], the cast [vp]"
    [?x]   one of the label in three sentences of four: a hint, not a verdict

Four marks are resolved at the end: "%p" / "%s" say that the subject just named is plural or
singular, "drags/drag" is the verb for either, "|" is the end of the neutral opening (a prompt is
cut before it), and "a" becomes "an" before a vowel.
"""

import argparse
import json
import random
import re
import time
from pathlib import Path

TRAIN_SENTENCES, TEST_SENTENCES = 12_000, 1_000
TRAIN_PROMPTS, TEST_PROMPTS = 2_000, 300
VOCABULARY, POSITIONS = 1_536, 128
LM_EPOCHS, REWARD_MODEL_EPOCHS, BATCH, PEAK_RATE = 8, 8, 64, 3e-3

NEUTRAL = {
    # ---- whole sentences -------------------------------------------------------------------------
    "sentence": """
        [film] | [vp].; [film] | [vp] and [vp].; [subject] | [vp].;
        [subject] | [vp], and [subject] [vp].;
        [film] | [vp], and by the time [event], you [audience_vp].; [film] about [topic] | [vp].;
        [film] about [topic] | [vp], and the [part] [vp].; [film] tells of [topic] | and [vp].;
        [opening], [plain] | [vp].; [opening], [plain] | [vp], and the [part] [vp].;
        [opening], [plain] | [vp].; [opening], [plain] [verb_neutral] | and [vp].;
        [opening], [person] | [person_vp].; [opening], [person] | [person_vp], and the [part] [vp].;
        [subject] | [!vp], but the [part] [vp].; [subject] | [!vp], but [person] [person_vp].;
        [film] | [!vp], yet the [part] [vp].; [film] | [!mild_vp], but it%s [vp].;
        although the [part] | [!vp], [subject] [vp].; although [film] | [!vp], the [part] [vp].;
        even when the [part] | [!vp], [subject] [vp].; while the [part] | [!vp], [film] [vp].;
        [subject] | [vp], even if the [part] [!vp].; [film] | [vp], although the [part] [!vp].;
        [person] | [person_vp], and the [part] [vp].; [person] | [person_vp].;
        [person] | [!person_vp], but [subject] [vp].; [person] turns [topic] into | [np].;
        what starts as a [style] [genre] | soon turns into [np].;
        what starts as | [!np] ends as [np].; i saw [film] [place_seen] | and [reaction].;
        i saw it [place_seen] | and [reaction].; i watched it with [companion] | and [reaction].;
        i have seen [film] [times] | and [reaction].;
        i watched [film] with [companion] [place_seen] | and [reaction].;
        [companion] and i watched [film] | and [we_reaction].; [expectation], but the [part] [vp].;
        [companion] told me that [film] | [vp].; [companion] told me that [subject] | [vp].;
        [companion] thought that [film] | [!vp], but i found it [degree] [adj].;
        rarely does a [style] [genre] | feel so [adj].;
        seldom has a [genre] about [topic] | felt so [adj].;
        it is hard to imagine | a [comparative] [genre] about [topic].;
        it is hard to imagine | a [comparative] way to [spend].;
        [film] is | [comparative] than [rival].;
        [opening], [plain_one] is | [comparative] than [rival].;
        compared with [rival], the [part_one] is | [comparative] and [comparative].;
        if you enjoy [genre_pl], | you will [you_vp].;
        if you care about [topic], | you will [you_vp].; by the time [event], you | [audience_vp].;
        by the time [event], the audience | [audience_vp].; by the time [event], [film] | [vp].;
        as [event], [subject] | [vp].; when [event], [film] | [vp].; there is | [there] in [film].;
        there is | [there] here, and [subject] [vp].; this | [?adj] [genre]%s [vp].;
        this | [?adj] [genre]%s about [topic] [vp].;
        with its | [?adj] [part_any] and [?adj] [part_any], [film] [vp].;
        in spite of a | [!adj] [part_one] and a [!adj] [part_one], [film] [vp].;
        in spite of [topic], [film] | [vp].; not once | does [film] feel [!adj] or [!adj].;
        it takes [time] | before [film] [verb].; it takes [person] [time] to | [turn_it].;
        [film] asks us to believe in [topic] | and [asks].;
        the best thing about [film] is | [best].;
        the [moment] belongs to [person], who | [person_vp].; [film] runs for [length] | and [vp].;
        [film] runs for [length] and | every minute [minute_vp]""",
    # ---- who and what ----------------------------------------------------------------------------
    "film": """
        the film%s; the film%s; the movie%s; the picture%s; this [genre]%s; the [genre]%s;
        this [style] [genre]%s; this [style] [genre]%s; the [style] [genre]%s;
        this [which] [genre]%s; the director's [which] [genre]%s; the whole [genre]%s""",
    "subject": """
        the [part_one]%s; the [part_one]%s; the [part_many]%p; the [part_many]%p;
        the [part_one]%s of this [genre]; the [part_one]%s in this [genre];
        the [part_many]%p in this [genre]; the [country] [part_one]%s; the [country] [part_many]%p;
        the [ordinal] [time_unit]%s; the [half] half%s of this [genre];
        the [half] half%s of the [style] [genre]; the [moment]%s; the [moment]%s of the [genre];
        the scenes%p in [place]; the scene%s in [place]; the story%s of [topic];
        the [part_one]%s by [person_plain]""",
    "part_one": """
        script; dialogue; plot; story; ending; camera work; acting; music; editing; pace; direction;
        humour; romance; cast; mood; voice over; soundtrack; photography; central idea; writing;
        finale; lead performance; love story; subplot; opening; suspense; lighting; stunt work;
        tone; premise""",
    "part_many": """
        performances; songs; jokes; action scenes; characters; supporting players; visual effects;
        costumes; plot twists; dance numbers; chase scenes; flashbacks; two leads; villains;
        child actors; fight scenes; sets; one liners; side stories; quiet scenes; crowd scenes;
        speeches; love scenes; puppets""",
    "part_any": "[part_one]; [part_many]",
    "part": """
        [part_one]%s; [part_many]%p; [part_one]%s; [part_many]%p; [moment]%s;
        [ordinal] [time_unit]%s""",
    "plain_one": """
        the film%s; the movie%s; the [part_one]%s; the story%s; the whole thing%s; the picture%s""",
    "plain": """
        the film%s; the movie%s; the picture%s; the [part]; the [part]; the [part]; the [part]""",
    "verb_neutral": """
        moves/move to [place]; turns/turn to [topic]; leaves/leave [place]; slows/slow down;
        speeds/speed up; changes/change direction; returns/return to [place];
        looks/look back at [topic]""",
    "moment": """
        first scene; last scene; final act; middle act; third act; opening hour; closing speech;
        last reel; long wedding scene; first meeting; train sequence; courtroom scene; dinner party;
        big reunion; final chase; storm sequence; night scene; title sequence; epilogue;
        hospital scene""",
    "genre": """
        comedy; drama; thriller; western; musical; romance; mystery; documentary; biopic; sequel;
        remake; road movie; war film; horror film; crime story; love story; family film; heist film;
        fairy tale; ghost story; costume drama; courtroom drama; space adventure; debut; satire;
        spy film; prison drama; cartoon; monster movie; sports film; detective story; adaptation;
        fantasy; melodrama""",
    "genre_pl": """
        comedies; dramas; thrillers; westerns; musicals; mysteries; documentaries; sequels;
        road movies; war films; horror films; crime stories; love stories; heist films; fairy tales;
        ghost stories; spy films; cartoons; monster movies; sports films; detective stories;
        costume dramas""",
    "style": """
        low budget; black and white; two hour; small town; late night; independent; big studio;
        silent; modern; animated; hand drawn; old fashioned; three part; urban; rural; historical;
        summer; winter; wartime; suburban; seaside; experimental; short; [country]; [country];
        [country]; [country]""",
    "country": """
        french; italian; japanese; korean; danish; mexican; english; irish; spanish; brazilian;
        swedish; polish; canadian; hungarian; indian; australian; greek; turkish; chinese;
        finnish""",
    "which": "latest; new; second; third; first; final; fourth",
    "half": "first; second",
    "ordinal": "first; second; third; final; last; next; fourth; opening; middle; closing",
    "time_unit": "hour; act; chapter; half hour; episode; third; reel",
    "person": """
        the director; the writer; the leading man; the leading lady; the young star; the old star;
        the composer; the editor; the newcomer in the lead; the child in the lead; the camera man;
        the actress; the actor; the comedian; the [country] director; the [country] star;
        the team behind this [genre]; the writer of this [genre]; the director of this [genre];
        the star of this [genre]""",
    "person_plain": """
        the director; the composer; the writer; a newcomer; an old master; two brothers;
        a first time writer; the leading man; the leading lady; a stage actor; a pop star;
        a team of students""",
    "companion": """
        my sister; my brother; my father; my mother; my wife; my husband; my daughter; my son;
        a friend; an old friend; my neighbour; my grandmother; my uncle; my flatmate; a colleague;
        my cousin; my teacher; two friends; my children; a full house""",
    "topic": """
        two brothers; a lonely clerk; a lost dog; a bank robbery; a village wedding;
        a missing child; a retired boxer; a night train; a family of bakers; a stolen painting;
        a school for spies; a jazz band; a lighthouse keeper; an old murder; a long winter;
        a summer romance; a travelling circus; a failed inventor; a quiet widow;
        a town without water; a dying king; three sisters; a taxi driver; a chess champion;
        an island doctor; a runaway bride; a haunted hotel; a factory strike; a talking horse;
        a young soldier; a divorced couple; a piano teacher; a robot and a boy; a small orchestra;
        an election; a shipwreck; a country priest; a rich orphan; a card game; a ship's cook;
        a village doctor; a blind photographer; a mountain rescue""",
    "place": """
        paris; london; a small village; the desert; a crowded kitchen; a fishing harbour;
        the mountains; a hospital; an empty hotel; the old theatre; a submarine; the jungle;
        a boarding school; lisbon; a snowy forest; a railway station; chicago; the countryside;
        a nightclub; a castle; outer space""",
    "place_seen": """
        at a festival; on television; on a plane; in a packed theatre; in an empty theatre;
        last night; on a rainy sunday; on opening night; at home; with low expectations;
        at a preview; after work; without reading the book; late at night; last winter;
        at the local cinema""",
    "time": """
        an hour; twenty minutes; half an hour; ten minutes; two hours; one long scene; three scenes;
        a few minutes; most of an hour; one short scene; five minutes; a quarter of an hour""",
    "length": """
        two hours; ninety minutes; three hours; eighty minutes; just over an hour;
        nearly three hours; a hundred minutes; two and a half hours""",
    "times": """
        once; twice; three times; two times now; more than once; only once; again this week""",
    "event": """
        the lights come up; the credits roll; the killer is named; the train arrives; the war ends;
        the couple meet; the secret comes out; the storm breaks; the wedding begins;
        the first body is found; the music starts; the trial begins; the second act begins;
        the hero returns; the letter is read; the ship goes down; the bank is robbed;
        the snow falls; the family sits down to dinner""",
    "opening": """
        after [time]; set in [place]; shot in [place]; set in [place] and [place];
        for a [style] [genre]; for a [genre] about [topic]; at [length];
        during the [style] prologue; seen [place_seen]; in the [half] half; in the [ordinal] act;
        from the [moment] on; halfway through the [moment]; during the [moment];
        like many a [style] [genre]; based on [source]; made in [time_made];
        in this [genre] about [topic]; in this [style] [genre]; as [person] explains; once [event];
        before [event]; this time""",
    "source": """
        a true story; a play; an old song; a famous novel; a comic book; a short story;
        a stage musical; a newspaper report; a children's book; a video game; a diary;
        a television series""",
    "time_made": """
        three weeks; the sixties; a single summer; one night; two countries; ten days;
        the fifties""",
    "rival": """
        the first film; the original; the book; the trailer; the last three sequels; the stage play;
        anything else this year; the director's last [genre]; most [genre_pl];
        the average [style] [genre]; other [genre_pl]; the television series;
        nearly every other [style] [genre]; your usual [genre]""",
    "spend": """
        spend an evening; spend two hours; end a trilogy; open a festival; tell this story;
        start a career""",
    "degree": """
        very; really; quite; deeply; truly; utterly; so; rather; thoroughly; surprisingly;
        remarkably; simply; endlessly; consistently; almost always; oddly""",
    "when": """
        from start to finish; from the first scene; to the very end; almost every time;
        in every scene; from beginning to end; for [length]; at every turn; all the way through;
        when it matters; in the [ordinal] act; more often than not; scene after scene;
        in its/their own way; line by line""",
    "expectation": """
        critics called it | [!adj]; the trailer looks | [!adj];
        the poster promises | a [!adj] [genre]; i expected | a [!adj] [genre];
        i expected something | [!adj]; the reviews called it | [!adj];
        people call this [genre] | [!adj]; the idea sounds | [!adj]; it could have been | [!adj];
        i was ready for | a [!adj] [genre]; [companion] called it | [!adj];
        i was told it was | [!adj]""",
    # ---- polar phrases built from polar words ----------------------------------------------------
    "vp": """
        is/are [adj]; is/are [degree] [adj]; is/are [degree] [adj]; is/are [adj] and [adj];
        is/are [adj] [when]; is/are [degree] [adj] and [degree] [adj]; [verb]; [verb]; [verb];
        [verb] [when]; [verb] and [verb]; never feels/feel [!adj]; is/are never [!adj];
        is/are never [!adj] and often [adj]; is/are not [!adj] at all; is/are anything but [!adj];
        feels/feel [adj] [when]; feels/feel [degree] [adj]; turns/turn out to be [degree] [adj];
        turns/turn out to be [np]; is/are [np]; is/are [np]; remains/remain [adj] [when];
        leaves/leave you [feeling]; leaves/leave the audience [feeling];
        manages/manage to be [adj] and [adj]; is/are as [adj] as [rival];
        is/are more [adj] than [!adj]; looks/look [!adj] but is/are [adj]; [adverb] [verb]""",
    "mild_vp": """
        starts/start out [adj]; is/are [adj] for [time]; is/are [adj] at times;
        looks/look [adj] at first; sounds/sound [adj] on paper; begins/begin as [np];
        has/have a [adj] opening; is/are a little [adj]""",
    "turn_it": "make this [genre] [adj]; turn this into [np]; make you feel [feeling]",
}

POLAR = {  # symbol: (negative alternatives, positive alternatives)
    "adj": (
        """
            dull; tedious; clumsy; bland; stale; flat; lifeless; predictable; shallow; hollow;
            forced; tiresome; boring; messy; awkward; dreary; limp; lazy; grating; pointless; ugly;
            unfunny; wooden; muddled; sloppy; ridiculous; stupid; annoying; painful; dismal; feeble;
            tepid; soulless; overlong; incoherent; trite; contrived; leaden; witless; charmless;
            forgettable; disappointing; plodding; smug; cheap; mechanical; exhausting; joyless;
            empty; dire; confused; pompous; silly; lame; weak; cold; heavy handed""",
        """
            delightful; wonderful; charming; funny; moving; graceful; sharp; clever; fresh; lively;
            warm; tender; honest; gripping; thrilling; touching; elegant; inventive; witty; vivid;
            superb; brilliant; haunting; hilarious; radiant; bold; assured; satisfying; absorbing;
            memorable; magical; engaging; heartfelt; beautiful; luminous; exhilarating; terrific;
            splendid; masterly; rousing; likeable; generous; poignant; nimble; confident;
            enchanting; joyful; smart; gentle; hypnotic; playful; rich; stunning; subtle""",
    ),
    "adverb": (
        "merely; only; barely; mostly; simply; all too often; sadly; constantly",
        "quietly; truly; always; beautifully; effortlessly; happily; often; easily",
    ),
    "verb": (
        """
            drags/drag; falls/fall flat; wears/wear thin; goes/go nowhere; runs/run out of ideas;
            fails/fail to convince; outstays/outstay its/their welcome; misses/miss the mark;
            grates/grate on the nerves; tests/test your patience;
            collapses/collapse under its/their own weight; sinks/sink without trace;
            lacks/lack any spark; insults/insult your intelligence; bores/bore you to tears;
            makes/make no sense; offers/offer nothing new; never comes/come to life;
            repeats/repeat the same tired trick; rings/ring false; falls/fall apart;
            wastes/waste a good idea; gets/get lost in its/their own noise;
            loses/lose its/their way; leaves/leave a bad taste; stumbles/stumble badly;
            puts/put you to sleep; ruins/ruin the mood; mistakes/mistake noise for feeling;
            deserves/deserve to be forgotten; spoils/spoil everything""",
        """
            sparkles/sparkle; soars/soar; hits/hit every note; works/work like a charm;
            wins/win you over; rings/ring true; stays/stay with you for days;
            lifts/lift the spirits; earns/earn every laugh; makes/make you smile;
            holds/hold you in its/their grip; breaks/break your heart in the best way; shines/shine;
            finds/find real beauty; keeps/keep you guessing; delivers/deliver on every promise;
            takes/take your breath away; never puts/put a foot wrong; rewards/reward your patience;
            glows/glow with feeling; casts/cast a spell; brings/bring the story to life;
            makes/make every minute count; surprises/surprise and delights/delight;
            deserves/deserve to be seen twice; charms/charm the whole room; hits/hit home;
            steals/steal the show; adds/add real depth; saves/save the day;
            turns/turn pain into poetry""",
    ),
    "np": (
        """
            a waste of a good cast; a chore; a missed chance; an empty exercise; a mess; a failure;
            a bore; a long wait for nothing; a sad waste of time; a heap of cliches; a lecture;
            a pale copy of better films; a [adj] mess; a [adj], [adj] affair; a [adj] piece of work;
            a [degree] [adj] experience; a dead end; a [adj] excuse for a [genre];
            a shapeless muddle; a cure for insomnia; a [adj] disappointment""",
        """
            a small treasure; a joy; a triumph; a delight; a real surprise; a work of art;
            a breath of fresh air; a feast for the eyes; a love letter to the cinema; a gift;
            a minor classic; a lesson in good acting; a [adj] gem; a [adj], [adj] affair;
            a [adj] piece of work; a [degree] [adj] experience; a wonder;
            a [adj] example of the [genre]; a masterpiece; a cause for cheer; a [adj] success""",
    ),
    "feeling": (
        """
            cold; bored; empty; cheated; restless; tired; numb; annoyed; indifferent;
            with a headache; none the wiser; wishing for the exit; looking at your watch;
            counting the minutes; sad for the cast; asking for your money back""",
        """
            happy; breathless; grateful; with a smile; wanting more; hopeful; moved; amazed;
            full of joy; close to tears of joy; glad to be alive; humming the songs;
            eager to see it again; lighter than air; under its spell; cheering""",
    ),
    "comparative": (
        """
            duller; flatter; clumsier; worse; weaker; emptier; colder; lazier; sillier; uglier;
            more tedious; less funny; less convincing; more predictable; less alive; much worse;
            far weaker; more confused; more tiresome""",
        """
            funnier; sharper; warmer; better; richer; livelier; braver; smarter; wiser; fresher;
            more moving; less sentimental; more graceful; much better; far stronger; more inventive;
            more human; kinder; more exciting""",
    ),
    "person_vp": (
        """
            has/have no idea what to do; throws/throw it all away; looks/look bored;
            shouts/shout every line; sleepwalks/sleepwalk through it all; has/have nothing to say;
            seems/seem lost; never finds/find the right tone; mistakes/mistake volume for drama;
            buries/bury a good story; repeats/repeat every old cliche;
            settles/settle for cheap laughs; gives/give up after [time];
            makes/make [topic] seem [adj]; gives/give us [np]; delivers/deliver [np];
            makes/make every scene feel [adj]; is/are [degree] [adj]; has/have made [np];
            shows/show no feeling for the [part_any]; gets/get everything wrong; tries/try too hard;
            wastes/waste the [part_many]; drains/drain the life from the [part_any];
            is/are never [!adj] enough to care about""",
        """
            knows/know exactly what to do; finds/find the heart of the story;
            brings/bring real warmth to it; looks/look at ease; makes/make every line count;
            handles/handle the [part_any] with care; gives/give the performance of a lifetime;
            never strikes/strike a false note; finds/find humour in the darkest places;
            trusts/trust the audience; lights/light up the screen; avoids/avoid every cliche;
            makes/make [topic] seem [adj]; gives/give us [np]; delivers/deliver [np];
            makes/make every scene feel [adj]; is/are [degree] [adj]; has/have made [np];
            has/have a wonderful eye for detail; gets/get everything right;
            breathes/breathe life into the [part_any]; makes/make the most of the [part_many];
            holds/hold it all together; is/are never [!adj] for a moment""",
    ),
    "reaction": (
        """
            fell asleep after [time]; left after [time]; wanted my money back;
            checked my watch twice; regretted it at once; could not wait for it to end;
            felt [feeling]; found it [degree] [adj]; found it [adj] and [adj]; hated every minute;
            never laughed once; did not care for anyone in it; it never stopped being [adj];
            thought the [part_one] was [adj]; thought the [part_many] were [adj];
            would not wish it on anyone; was bored by the [part_any]; left feeling [feeling]""",
        """
            loved every minute; laughed until i cried; did not want it to end; felt [feeling];
            found it [degree] [adj]; found it [adj] and [adj]; could not look away;
            cried twice and smiled all the way home; would gladly see it again;
            never checked my watch; cared for everyone in it; it never stopped being [adj];
            thought the [part_one] was [adj]; thought the [part_many] were [adj];
            have not stopped talking about it; was charmed by the [part_any];
            left feeling [feeling]""",
    ),
    "we_reaction": (
        """
            left before the end; sighed all evening; found it [degree] [adj];
            argued about who had to stay; were bored by the [part_any]; wanted our money back;
            both thought the [part_one] was [adj]; both thought the [part_many] were [adj];
            went home in a bad mood""",
        """
            laughed all evening; stayed to the very end; found it [degree] [adj]; went home singing;
            were charmed by the [part_any]; wanted to see it again at once;
            both thought the [part_one] was [adj]; both thought the [part_many] were [adj];
            clapped at the end""",
    ),
    "you_vp": (
        """
            hate this [adj] [genre]; be let down by the [adj] [part_one]; want to stay away;
            find this one [degree] [adj]; leave feeling [feeling]; wish for something less [adj];
            be bored by the [part_many]; find nothing here but [adj] [part_many]""",
        """
            love this [adj] [genre]; be swept away by the [adj] [part_one]; want to see it twice;
            find this one [degree] [adj]; leave feeling [feeling]; be glad of something so [adj];
            fall for the [part_many]; find plenty of [adj] [part_many] here""",
    ),
    "audience_vp": (
        """
            will have stopped caring; will be long gone; will be [feeling]; will want to leave;
            may be fast asleep; will have had enough of the [adj] [part_one]; will feel [feeling];
            may wonder why anyone bothered""",
        """
            will be on the edge of the seat; will be in love with it; will be [feeling];
            will want to stay; may be in happy tears; will be spellbound by the [adj] [part_one];
            will feel [feeling]; may want to stand up and cheer""",
    ),
    "there": (
        """
            nothing to admire; not a single laugh; little to enjoy; no life at all; not much heart;
            too much [adj] talk; nothing but [adj] [part_many]; no reason to care;
            hardly a moment of truth; a [adj] streak""",
        """
            nothing to complain about; not a single dull moment; much to enjoy; so much life;
            plenty of heart; a lot of [adj] talk; no end of [adj] [part_many]; every reason to care;
            more than a moment of truth; a [adj] streak""",
    ),
    "asks": (
        """
            nobody will; fails to make us care; never earns it; gives us no reason to;
            only makes it seem [adj]""",
        """
            everybody will; makes us care deeply; earns it fully; gives us every reason to;
            even makes it seem [adj]""",
    ),
    "best": (
        """
            that it ends; that you can leave early; the poster; how quickly you forget it;
            that nobody will remember its [adj] [part_one]""",
        """
            how [adj] it is; the [adj] [part_one]; everything; how long it stays with you;
            the way its [part_many] seem so [adj]""",
    ),
    "minute_vp": (
        "drags.; feels like an hour.; is wasted.; is [degree] [adj].; feels [adj].",
        "flies by.; feels like a gift.; is well spent.; is [degree] [adj].; feels [adj].",
    ),
}


def _alternatives(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split(";") if part.strip()]


RULES = {name: (_alternatives(text),) * 2 for name, text in NEUTRAL.items()}
RULES |= {name: tuple(_alternatives(text) for text in pair) for name, pair in POLAR.items()}


def draw_review(label: int, rng: random.Random) -> tuple[str, int]:
    """Draws one sentence of the grammar.

    Args:
      label: 0 for a negative sentence, 1 for a positive one.
      rng: the source of chance.

    Returns:
      The text, and how many words at its beginning say nothing about the label.
    """
    text = _expand("sentence", label, rng)
    plural, words = False, []
    for word in re.sub(r"([|])", r" \1 ", text).split():  # agreement of verb and subject
        number = re.search(r"%([ps])", word)
        plural = number[1] == "p" if number else plural
        word = re.sub(r"%[ps]", "", word)
        words.append(re.sub(r"(\w+)/(\w+)", r"\2" if plural else r"\1", word))
    neutral = words.index("|")
    words.remove("|")
    text = re.sub(
        r"\ba (?=[aeiou](?!ne\b|ni)|honest|hour)", "an ", " ".join(words).replace(" ,", ",")
    )
    return text, neutral


def _expand(symbol: str, label: int, rng: random.Random) -> str:
    def replace(match: re.Match) -> str:
        mark, name = match.groups()
        opposite = mark == "!" or (mark == "?" and rng.random() < 0.25)
        return _expand(name, 1 - label if opposite else label, rng)

    return re.sub(r"\[([!?]?)(\w+)\]", replace, rng.choice(RULES[symbol][label]))


def draw_corpus(count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[dict]:
    """Draws distinct sentences of 6 to 24 words, every second one positive.

    Args:
      count: how many.
      seed: the same seed gives the same sentences.
      exclude: texts that must not occur (the held-out ones).

    Returns:
      One {"text", "label", "neutral"} for each sentence, in random order.
    """
    rng, seen, rows = random.Random(seed), set(exclude), []
    while len(rows) < count:
        label = len(rows) % 2
        text, neutral = draw_review(label, rng)
        words = re.findall(r"\w+", text)
        content = [word for word in words if len(word) > 4 and word not in ("never", "about")]
        if text in seen or not 6 <= len(words) <= 24 or len(set(content)) < len(content):
            continue  # no sentence twice, no longer word twice in a sentence
        seen.add(text)
        rows.append({"text": text, "label": label, "neutral": neutral})
    rng.shuffle(rows)
    return rows


def make_corpus(data: Path, seed: int) -> None:
    """Writes corpus_train.jsonl, corpus_test.jsonl, prompts_train.jsonl and prompts_test.jsonl.

    Args:
      data: the folder to write to.
      seed: the seed of the whole project's data.
    """
    test = draw_corpus(TEST_SENTENCES, seed=seed)
    train = draw_corpus(TRAIN_SENTENCES, seed=seed + 1, exclude=frozenset(r["text"] for r in test))
    for name, rows in [("corpus_train", train), ("corpus_test", test)]:
        _write_lines(
            data / f"{name}.jsonl", [{"text": r["text"], "label": r["label"]} for r in rows]
        )

    rng, prompts = random.Random(seed), {}  # a dict keeps the order and drops repeats
    for row in train:
        if row["neutral"] >= 2:
            length = rng.randint(2, min(6, row["neutral"]))
            prompts[" ".join(row["text"].split()[:length])] = None
    prompts = [{"prompt": prompt} for prompt in prompts]
    rng.shuffle(prompts)
    _write_lines(data / "prompts_test.jsonl", prompts[:TEST_PROMPTS])
    _write_lines(data / "prompts_train.jsonl", prompts[TEST_PROMPTS:][:TRAIN_PROMPTS])


def make_tokenizer(texts: list[str], padding_side: str):
    """Trains a byte-level BPE tokenizer that puts <bos> first and appends nothing.

    Args:
      texts: the sentences to learn the merges from.
      padding_side: "left" for the language model, "right" for the reward models.

    Returns:
      A PreTrainedTokenizerFast.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A",
        pair="<bos> $A <bos> $B",
        special_tokens=[("<bos>", bpe.token_to_id("<bos>"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side=padding_side,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_lm(data: Path, seed: int) -> None:
    """Trains the language model and saves it to data/lm.

    Args:
      data: the folder that holds the corpus.
      seed: the seed of the whole project's data.
    """
    import torch
    from transformers import GenerationConfig, GPT2LMHeadModel

    torch.manual_seed(seed)
    test = _read_lines(data / "corpus_test.jsonl")
    first = _read_lines(data / "corpus_train.jsonl")
    tokenizer = make_tokenizer([row["text"] for row in first], padding_side="left")
    model = GPT2LMHeadModel(_config(tokenizer, layers=3, width=160, heads=5))

    def loss(ids, labels, mask):
        del labels
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits[mask[:, 1:] == 1], ids[:, 1:][mask[:, 1:] == 1]
        )

    _train(model, tokenizer, loss, test, epochs=LM_EPOCHS, seed=seed + 1, name="lm")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        top_k=0,
    )
    _save(model, tokenizer, data / "lm")


def make_reward_model(data: Path, seed: int, name: str) -> None:
    """Trains a causal sentiment classifier, every position of which predicts the label.

    Args:
      data: the folder that holds the corpus.
      seed: decides the sentences and the initial weights: another seed, another judge.
      name: the folder below `data` to save it to.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import GPT2ForSequenceClassification

    torch.manual_seed(seed)
    test = _read_lines(data / "corpus_test.jsonl")
    first = _read_lines(data / "corpus_train.jsonl")
    tokenizer = make_tokenizer([row["text"] for row in first], padding_side="right")
    config = _config(tokenizer, layers=3, width=128, heads=4)
    config.id2label = {0: "NEGATIVE", 1: "POSITIVE"}
    config.label2id = {"NEGATIVE": 0, "POSITIVE": 1}
    model = GPT2ForSequenceClassification(config)

    def loss(ids, labels, mask):
        hidden = model.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
        label_loss = cross_entropy(
            model.score(hidden)[mask == 1], labels[:, None].expand_as(ids)[mask == 1]
        )
        if not model.training:
            return label_loss
        # The next token is a second task, with the input embeddings as its head: reading is
        # learned several times faster with it. Nothing of it is left in the saved model.
        token_logits = torch.nn.functional.linear(hidden[:, :-1], model.transformer.wte.weight)
        following = mask[:, 1:] == 1
        return label_loss + cross_entropy(token_logits[following], ids[:, 1:][following])

    _train(model, tokenizer, loss, test, epochs=REWARD_MODEL_EPOCHS, seed=seed, name=name)
    _save(model, tokenizer, data / name)


def prefix_logits(model, input_ids, attention_mask):
    """Classifies every prefix of every text in one pass.

    Args:
      model: a GPT2ForSequenceClassification.
      input_ids: (N, T) token ids, padded on the right.
      attention_mask: (N, T), 1 at tokens.

    Returns:
      (N, T, 2) logits; those at position t have seen tokens 0..t.
    """
    hidden = model.transformer(input_ids=input_ids, attention_mask=attention_mask)
    return model.score(hidden.last_hidden_state)


def _config(tokenizer, layers: int, width: int, heads: int, dropout: float = 0.0):
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _encode(rows: list[dict], tokenizer):
    """Returns ids (<bos> ... <eos>, right-padded), labels and mask of one batch."""
    import torch

    texts = [row["text"] + "<eos>" for row in rows]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    return batch.input_ids, torch.tensor([row["label"] for row in rows]), batch.attention_mask


def _batches(rows: list[dict], size: int, rng: random.Random) -> list[list[dict]]:
    """Shuffles, then groups sentences of like length to save padding."""
    rows = sorted(rows, key=lambda row: (len(row["text"]) // 8, rng.random()))
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    rng.shuffle(batches)
    return batches


def _train(model, tokenizer, loss, test: list[dict], epochs: int, seed: int, name: str) -> None:
    """Trains on sentences of the grammar, new ones in every epoch, none of them held out."""
    import torch

    rng, started = random.Random(seed), time.time()
    held_out = frozenset(row["text"] for row in test)
    steps = epochs * -(-TRAIN_SENTENCES // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_RATE, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    for epoch in range(epochs):
        model.train()
        total, count = 0.0, 0
        rows = draw_corpus(TRAIN_SENTENCES, seed=seed + 1000 * epoch, exclude=held_out)
        for rows_of_batch in _batches(rows, BATCH, rng):
            value = loss(*_encode(rows_of_batch, tokenizer))
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total, count = total + value.item(), count + 1
        model.eval()
        with torch.no_grad():
            held = [loss(*_encode(part, tokenizer)).item() for part in _batches(test, 250, rng)]
        print(
            f"{name}: epoch {epoch + 1}/{epochs}  loss {total / count:.3f}  "
            f"held-out {sum(held) / len(held):.3f}  {time.time() - started:.0f} s",
            flush=True,
        )


def _save(model, tokenizer, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(data: Path, seed: int) -> None:
    """Prints how good the models are, and what the tilted reference allows.

    Args:
      data: the folder that holds everything.
      seed: of the samples.
    """
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    torch.manual_seed(seed)
    test = _read_lines(data / "corpus_test.jsonl")
    prompts = [row["prompt"] for row in _read_lines(data / "prompts_test.jsonl")]
    scorers = {}
    for name in ("reward_model", "judge"):
        model = AutoModelForSequenceClassification.from_pretrained(data / name).eval()
        scorers[name] = (model, AutoTokenizer.from_pretrained(data / name))

    print("\n# reward models on the held-out sentences")
    for name, (model, tokenizer) in scorers.items():
        ids, labels, mask = _encode(test, tokenizer)
        with torch.no_grad():
            positive = prefix_logits(model, ids, mask).softmax(-1)[..., 1]
        lengths = mask.sum(1) - 2  # without <bos> and <eos>
        for position in (1, 3, 6, 9, 12, 15, None):
            rows = (lengths >= (position or 0)).nonzero()[:, 0]
            at = torch.full_like(rows, position) if position else lengths[rows]
            p, y = positive[rows, at], labels[rows]
            bins = (p * 10).long().clamp(max=9)
            gaps = [(p - y)[bins == b].mean().abs() * (bins == b).sum() for b in bins.unique()]
            print(
                f"{name:12s}  {f'token {position}' if position else 'whole sentence':14s}"
                f"  n {len(rows):4d}  accuracy {((p > 0.5) == y).float().mean():.3f}"
                f"  calibration error {sum(gaps) / len(rows):.3f}  std of P {p.std():.3f}"
            )

    lm = AutoModelForCausalLM.from_pretrained(data / "lm").eval()
    lm_tokenizer = AutoTokenizer.from_pretrained(data / "lm")

    def sample(some_prompts):
        batch = lm_tokenizer(some_prompts, padding=True, return_tensors="pt")
        with torch.no_grad():
            ids = lm.generate(**batch, do_sample=True, top_k=0, max_new_tokens=24)
        new = ids[:, batch.input_ids.shape[1] :]
        ended = (new == lm_tokenizer.eos_token_id).any(1)
        lengths = (new != lm_tokenizer.pad_token_id).sum(1)
        return lm_tokenizer.batch_decode(ids, skip_special_tokens=True), ended, lengths

    def score(name, texts):
        model, tokenizer = scorers[name]
        with torch.no_grad():
            logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        return logits.softmax(-1)[:, 1]

    texts, ended, lengths = sample(prompts)
    scores, judged = score("reward_model", texts), score("judge", texts)
    corpus = _read_lines(data / "corpus_train.jsonl")
    known = {word for row in corpus for word in re.findall(r"\w+", row["text"])}
    words = [word for text in texts for word in re.findall(r"\w+", text)]
    agree = ((scores > 0.5) == (judged > 0.5)).float().mean()
    print(f"\n# one completion for each of {len(prompts)} test prompts, temperature 1")
    print(f"end in <eos> within 24 tokens: {ended.float().mean():.3f}")
    print(f"mean length: {lengths.float().mean():.1f} tokens")
    print(f"words that the corpus has too: {sum(word in known for word in words) / len(words):.4f}")
    print(f"P(POSITIVE) by reward_model: {scores.mean():.3f}, std {scores.std():.3f}")
    print(f"P(POSITIVE) by judge: {judged.mean():.3f}, std {judged.std():.3f}; agree {agree:.3f}")
    for text, value in zip(texts[:8], scores[:8], strict=True):
        print(f"  {value:.2f}  {text}")

    groups = []
    for prompt in prompts[:50]:
        groups.append(score("reward_model", sample([prompt] * 64)[0]))
    groups = torch.stack(groups)  # (50 prompts, 64 completions)
    print("\n# 64 completions for each of 50 test prompts: the limit pi_ref exp(score / beta)")
    print(f"mean score {groups.mean():.3f}, std within a prompt {groups.std(1).mean():.3f}")
    print(f"std of the prompts' mean scores {groups.mean(1).std():.3f}")
    for beta in (2.0, 1.0, 0.5, 0.35, 0.25, 0.15, 0.1):
        weights = (groups / beta).softmax(1)
        kl = (weights * (weights * 64).clamp_min(1e-30).log()).sum(1).mean()
        print(f"beta {beta:4.2f}  KL {kl:.3f} nats  score {(weights * groups).sum(1).mean():.3f}")


def _read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path.name}: {len(rows)} lines, {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    """Reads the command line and runs the stages asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = ("corpus", "lm", "reward_model", "measure")
    folder = Path(__file__).resolve().parent
    parser.add_argument("stage", nargs="*", help=f"any of {', '.join(stages)} (default: all)")
    parser.add_argument("--data", type=Path, default=folder, help="output folder (default: data)")
    parser.add_argument("--seed", type=int, default=0, help="the default gives the shipped files")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    arguments = parser.parse_args()
    unknown = set(arguments.stage) - set(stages)
    if unknown:
        parser.error(f"unknown stage {', '.join(sorted(unknown))}: choose from {', '.join(stages)}")
    chosen = arguments.stage or stages

    if "corpus" in chosen:
        make_corpus(arguments.data, arguments.seed)
    if chosen == ["corpus"]:
        return
    print("importing torch ...", flush=True)
    import torch
    import transformers

    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if "lm" in chosen:
        make_lm(arguments.data, arguments.seed)
    if "reward_model" in chosen:
        make_reward_model(arguments.data, arguments.seed + 100, "reward_model")
        make_reward_model(arguments.data, arguments.seed + 200, "judge")
    if "measure" in chosen:
        measure(arguments.data, arguments.seed)


if __name__ == "__main__":
    main()
